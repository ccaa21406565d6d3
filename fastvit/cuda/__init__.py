"""The launchers of the CUDA kernels (``csrc/``): names and arguments of the Triton ones, on the compiled extension.

Products take float16 and bfloat16; LayerNorm and elementwise kernels take float32 too. Arguments are as the Triton
launchers' unless a docstring says otherwise; layouts that a kernel does not read are copied once.
"""
