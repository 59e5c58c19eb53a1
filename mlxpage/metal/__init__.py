"""The metal wing: it computes, with arrays and kernels, and never sees a `Sequence`.

In an installed package the texts of the kernels lie here too.
"""
