"""How good a backbone is: features extracted once, then each protocol (SVM, kNN) as a function of arrays."""
