"""The arithmetic of `models/llama/decoder.py`, kernel by kernel: each file holds the definition in torch, which CPUs
run, and hands CUDA tensors to the Triton version beside it (`*_triton.py`). Tests compare the two.
"""
