"""Is a backbone good? Features once (compare.py), then each protocol as a function of arrays (svm.py, knn.py)."""
