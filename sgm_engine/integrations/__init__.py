"""The engine inside other libraries: one module for each, which says in its docstring what to write there.

k_diffusion · diffusers · edm · azula · deepinv. None is imported by the package; all but ``diffusers``, whose classes
extend that library's, know the library by the calls that they make and answer, and never import it.
"""
