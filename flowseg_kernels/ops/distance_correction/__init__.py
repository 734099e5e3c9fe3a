"""The distance-aware correction: the gradient of a cross-entropy on distances to the centroids."""
