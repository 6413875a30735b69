"""Several runs in a row, each taking what a former one made: read from one file, run, and gone on with.

Pipeline.read("story.yaml").run()
"""

from llmtk.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
