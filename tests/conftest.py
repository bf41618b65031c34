import sys
from pathlib import Path

import torch
from hypothesis import settings

# The scripts and the toy environments are plain files: `import ppo_clip` and `--env toys:…` find
# them so.
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

torch.set_num_threads(1)  # as train does; with more, tests that run beside each other are slow
