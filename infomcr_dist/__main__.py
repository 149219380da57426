"""``python -m infomcr_dist COMMAND``: the same as ``infomcr COMMAND``."""

import sys

from infomcr_dist.cli import main

sys.exit(main())
