"""One job of a run on a Ray cluster: index the training set by sketches, for `ray-tracin query`.

ray job submit --working-dir . -- python jobs/index.py --run s3://bucket/run --size 32
"""

import typer

from ray_tracin.cli import sketches

if __name__ == "__main__":
    typer.run(sketches)
