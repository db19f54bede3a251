"""One job of a run on a Ray cluster: complete the step ``ablation``, and what it needs before it.

ray job submit --working-dir . -- python jobs/ablation.py --run s3://bucket/run --config config.yaml
"""

from ray_tracin.cli import job

if __name__ == "__main__":
    job("ablation")
