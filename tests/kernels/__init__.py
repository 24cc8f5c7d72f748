"""The kernels' tests: `pytest tests/kernels` needs no card, and reads like a review of one kernel after the other.

Tests, in the order in which a review reads them:

    test_reference          the specification, against torch's own functions and other ways to write a formula
    test_torch_ops          what runs without Triton, against the specification
    test_ops                the dispatch, and what every op promises: no argument written over, traced by the compiler
    test_launch             what all launchers share
    test_every_op_is_everywhere   no op lacks a formula, a kernel, a test, a compile spec or a bench
    test_<kernel>           one file a `<kernel>_triton.py`: values at awkward sizes, strides, errors, gradients,
                            torch.compile; on a card CUDA graphs, large tensors, bfloat16
    test_aot                kernels compile for sm_80, sm_90 and sm_100 without spilling, and as the table says
    test_rehearsal          what is to happen on a card, on a pretended one
    test_sanitizer          every kernel is launched; on a card under compute-sanitizer

Without a CUDA device kernels run in Triton's interpreter, which `tests/conftest.py` turns on; `pytest -m gpu` runs what
needs a card. How far a kernel may be off is derived, not guessed: `tests.conftest.check_error`.

Support:

    kernel_cases.py         sizes, dtypes, and the checks of gradients that the tests share
    every_kernel.py         each kernel once in each of its forms, for the sanitizer
    aot/                    the compiler's driver, its table of registers and shared memory, one file of specs a kernel
    pretended/              a card that is not there, pytest on it, and the rehearsal that runs there
"""
