"""`python -m safegene_converter` is `safegene`."""

import sys

from safegene_converter.cli.main import main

sys.exit(main())
