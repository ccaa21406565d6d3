"""Writes wgmma_operands.h: the operand lists of wgmma, which inline assembly wants spelled out for every N.

python csrc/include/wgmma_operands.py > csrc/include/wgmma_operands.h
"""

print(
    "// Written by wgmma_operands.py. X(N, D, I0 to I6, constraints): D names the N / 2 accumulators %0, %1, ..., and"
)
print("// I0 to I6 the operands that follow them.")
print("#pragma once")
for n in range(8, 257, 8):
    previous = f"FASTVIT_WGMMA_D_{n - 8} " if n > 8 else ""
    first = n // 2 - 4
    names = (", " if n > 8 else "") + ", ".join(f"%{i}" for i in range(first, first + 4))
    bound = ", ".join(f'"+f"(d[{i}])' for i in range(first, first + 4))
    before = f"FASTVIT_WGMMA_R_{n - 8}, " if n > 8 else ""
    print(f'#define FASTVIT_WGMMA_D_{n} {previous}"{names}"')
    print(f"#define FASTVIT_WGMMA_R_{n} {before}{bound}")
print("#define FASTVIT_WGMMA_EACH(X) \\")
for n in range(8, 257, 8):
    operands = ", ".join(f'"%{n // 2 + i}"' for i in range(7))
    print(f"  X({n}, FASTVIT_WGMMA_D_{n}, {operands}, FASTVIT_WGMMA_R_{n})" + " \\" * (n < 256))
