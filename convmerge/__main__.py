"""``python -m convmerge``."""

import sys

from convmerge.cli import main

sys.exit(main())
