"""`python -m vadapter`."""

import sys

from vadapter.cli.main import main

sys.exit(main())
