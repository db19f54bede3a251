"""The whole run as one job on a Ray cluster: every step, each resumed where it stands.

ray job submit --working-dir . -- python jobs/pipeline.py --run s3://bucket/run --config config.yaml
"""

from ray_tracin.cli import ALL_STEPS, job

if __name__ == "__main__":
    job(ALL_STEPS)
