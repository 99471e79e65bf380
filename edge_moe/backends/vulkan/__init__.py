"""Runs a model pass on a GPU by WGSL compute shaders, through wgpu: on Vulkan, Metal or DirectX."""
