"""What cards of each compute capability offer: the one place to add another.

CUDA C Programming Guide, "Technical Specifications per Compute Capability" and "Shared Memory" of each capability.
"""

from dataclasses import dataclass

from minivlm2vec_kernels.cards import CARDS


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor; bytes, 32-bit registers."""

    shared: int  # of all its blocks together
    shared_block: int  # that one block may ask for
    warps: int
    most_blocks: int
    registers: int = 65_536
    warp: int = 32  # threads

    def blocks(self, registers: int, shared: int, warps: int) -> int:
        """How many fit at a time. registers: of a thread; shared: bytes of a block; warps: of a block.

        Registers are given to a warp by 256, warps come in fours, and each block's shared memory has 1,024 bytes more
        for the system (the guide's occupancy calculator).
        """
        if shared > self.shared_block:
            return 0
        a_warp = -(-max(registers, 1) * self.warp // 256) * 256
        by_registers = self.registers // a_warp // 4 * 4 // warps
        return min(self.most_blocks, self.warps // warps, by_registers, self.shared // (shared + 1024))


LIMITS = {  # by capability, as Triton names it: 90 is sm_90
    80: Limits(shared=167_936, shared_block=CARDS["sm_80"].shared, warps=64, most_blocks=32),
    90: Limits(shared=233_472, shared_block=CARDS["sm_90"].shared, warps=64, most_blocks=32),
    100: Limits(shared=233_472, shared_block=CARDS["sm_100"].shared, warps=64, most_blocks=32),
}
