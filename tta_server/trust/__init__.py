"""Whether an adapted answer may be served: guard, guarantees, labels, abstention."""
