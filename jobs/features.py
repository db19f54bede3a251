"""One job of a run on a Ray cluster: complete the step ``features``, and what it needs before it.

ray job submit --working-dir . -- python jobs/features.py --run s3://bucket/run --config config.yaml
"""

from ray_tracin.cli import job

if __name__ == "__main__":
    job("features")
