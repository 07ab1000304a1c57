"""Reference implementations: slow and obvious, for float64, differentiable by autograd.

They share no code with the package; of it they read the configuration only. `document_BS` holds
one number per position; a document is a run of equal numbers, and each number occurs in one run
of a row. None means one document per row.
"""
