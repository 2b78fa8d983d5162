"""What proves a map: scores, data sets in their own formats, and the evaluation of a model on them."""
