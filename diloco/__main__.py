"""``python -m diloco`` is the ``diloco`` command."""

import sys

from diloco.cli import main

sys.exit(main())
