"""HostMain under its name of 2009: python ./boincvm/HostMain.py ./boincvm/HostConfig.cfg

The wrapper takes these words for its own HostMain; by hand they start the one that lies beside this file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vmcontrol.hostmain.main import main

sys.exit(main())
