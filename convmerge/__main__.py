"""``python -m convmerge``."""

import sys

from convmerge.cli.main import main

sys.exit(main())
