"""Hugging Face's Trainer with GPA: the Trainer trains at one point and evaluates and saves another, the average.

    pip install 'diloco[hf]'
    python examples/hf_trainer.py                 trains a small random Llama on counting sequences
    python examples/hf_trainer.py --resume        continues from the newest checkpoint in hf-run/

Trainer calls `optimizer.train()` before every step and `optimizer.eval()` before every evaluation, which is all that
GPA needs; `diloco.SNOO` works in its place. Whatever you save after `trainer.evaluate()` are the averaged weights.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and data are made here

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import diloco
from diloco.schedules import scheduler

VOCABULARY, LENGTH = 64, 32


def sequences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards by a fixed stride, which the model has to find out: start, start + stride, ..."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (count, 1), generator=generator)
    stride = torch.randint(1, 5, (count, 1), generator=generator)
    rows = (start + stride * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint-every", type=int, default=50, metavar="N")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    optimizer = diloco.GPA(inner, mu_x=0.97, mu_y=0.7)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="hf-run",
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            eval_strategy="steps",
            eval_steps=arguments.checkpoint_every,
            save_steps=arguments.checkpoint_every,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=sequences(2048, seed=1),
        eval_dataset=sequences(128, seed=2),
        # GPA wants a schedule that ends low. Built on GPA, it sets the learning rate of the optimizer inside.
        optimizers=(optimizer, scheduler(optimizer, "cosine", arguments.steps, arguments.steps // 20)),
    )
    print(f"held-out loss before: {trainer.evaluate()['eval_loss']:.4f} nats/token")
    trainer.train(resume_from_checkpoint=arguments.resume)
    print(f"held-out loss after:  {trainer.evaluate()['eval_loss']:.4f} nats/token")
    trainer.save_model("hf-run/final")  # after evaluate(): the average
    optimizer.train()
    model.eval()
    with torch.no_grad():
        rows = torch.stack([item["input_ids"] for item in sequences(128, seed=2)])
        print(f"  where it trained:   {model(input_ids=rows, labels=rows).loss:.4f} nats/token")


if __name__ == "__main__":
    main()
