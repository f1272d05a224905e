"""The forward pass in C++ for CPUs with AVX-512: step.h and its parts, and how they are built. No torch."""
