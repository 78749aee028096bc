"""`diloco chaos`: a real cluster on this machine under a seeded schedule of faults, checked against its promises.

Pure: `schedule` (what happens when), `checks` (what must hold), `report` (how it is told). With processes, sockets and
signals: `command` (the command line), `director` (a run from beginning to end), `cluster` (the processes), `strike`
(one fault begun and ended), `wire` (a worker's way to the coordinator). Run inside workers: `paced` (a model that takes
its time), `hostile` (a worker that lies). Nothing outside this folder imports any of it but the command line.
"""
