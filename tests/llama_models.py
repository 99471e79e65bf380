"""Models opened by llama.cpp, on whatever CPU."""

from unittest import mock

import llvmlite.binding


def open_llama(path, **settings):
    """A llama_cpp.Llama. On CPUs with AMX its own form of the weights is left out: it aborts at latent attention."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    if llvmlite.binding.get_host_cpu_features().get("amx-int8"):
        params.use_extra_bufts = False
    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", return_value=params):
        return llama_cpp.Llama(str(path), verbose=False, **settings)
