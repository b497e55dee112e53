"""`python -m vadapter`."""

import sys

from vadapter.cli import main

sys.exit(main())
