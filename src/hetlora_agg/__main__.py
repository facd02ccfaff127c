"""`python -m hetlora_agg` is the command line."""

import sys

from hetlora_agg.cli import main

if __name__ == "__main__":
    sys.exit(main())
