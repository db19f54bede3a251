"""One job of a run on a Ray cluster: complete the step ``report``, and what it needs before it.

ray job submit --working-dir . -- python jobs/report.py --run s3://bucket/run --no-images
"""

from ray_tracin.cli import job

if __name__ == "__main__":
    job("report")
