"""Benchmark each operation against its peers and its floor, on the current GPU or by what is known without one.

Compare your own function with an operation, as `mixtral-triton bench --peer` does:

    from examples.my_experts import swiglu
    from mixtral_triton.tools.bench import compare

    for row in compare("expert_swiglu", {"T": 16, "H": 256, "I": 512, "E": 8, "K": 2}, peers={"mine": swiglu}):
        print(row.case.sizes, row.floor_s, row.ours, row.peers["mine"])
"""

from .measure import compare as compare
