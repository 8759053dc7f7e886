"""`ImageRegressionData`: images with one number each, or with several."""

from __future__ import annotations

from flashtask.data.image_data import ImageData
from flashtask.data.targets import NumberReader

__all__ = ["ImageRegressionData"]


class ImageRegressionData(ImageData):
    """Images with one number each, or with several: columns of a table, or folders that are named by a number.

    The numbers stay in their own unit. Mean and standard deviation of the training samples are kept with the model,
    which is trained on numbers of mean 0 and deviation 1.
    """

    readers = (NumberReader,)
