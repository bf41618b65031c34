"""Train a script of ours until the mean return of 100 training episodes reaches a level.

    python benchmarks/until.py SCRIPT LEVEL SECONDS OPTIONS...

It prints the steps taken; inf where the training ends, or lasts longer than that, below the level.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
name, level, seconds, *options = sys.argv[1:]
script = importlib.import_module(name.removesuffix(".py"))


class Run(script.Run):
    def write(self, *arguments) -> None:
        super().write(*arguments)
        row = self.rows[-1]
        is_reached = row["episodes"] >= 100 and row["episodic_return"] >= float(level)
        if is_reached or row["wall_time"] > float(seconds):
            print(row["global_step"] if is_reached else "inf")
            sys.exit()


script.Run = Run
script.train(script.tyro.cli(script.Args, args=options))
print("inf")
