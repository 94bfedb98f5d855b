"""The Triton kernels by subject, launched by `gpu`. All modules of this package need Triton."""
