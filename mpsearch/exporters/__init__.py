"""Export: a picked config arrives in the library that trains or runs the final model."""
