"""`python -m tokencredit` is the command `tokencredit`."""

import sys

from tokencredit.cli import main

sys.exit(main())
