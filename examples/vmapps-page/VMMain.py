"""The agent under its name of 2009: python VMMain.py VMConfig.cfg"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from guest.agent.main import main

sys.exit(main())
