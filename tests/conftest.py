import sys
from pathlib import Path

import torch
from hypothesis import settings

# The scripts and the toy environments are plain files: `import ppo_clip` and `--env toys:…` find
# them so.
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

# The same examples in each run, and no deadline: neither chance nor a busy machine is a failure.
# To search further: pytest --hypothesis-profile search --hypothesis-seed N
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("same")

torch.set_num_threads(1)  # as train does; with more, tests that run beside each other are slow
