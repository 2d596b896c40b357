"""C++ kernels (`*.h`: portable cores without torch types; `*.cpp`: their PyTorch registrations) and their build."""
