"""What came out of a run: how each sample was judged, the statistics of that, and the page that shows it.

It works on tables of samples and on predictions, and knows no task.
"""
