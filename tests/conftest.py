import sys
from pathlib import Path

# The scripts and the toy environments are plain files; this is how `import ppo_clip` and `--env toys:…` find them.
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
