/*
 * vendor_nvrtc.h - the compiler that cuDNN calls for some of its kernels, found where the rest of CUDA was.
 *
 * cuDNN looks for NVRTC by its name when it first needs it, and NVRTC for a part of itself: where the toolkit lies in a folder that the system's loader does
 * not know, neither is found, and an attention has no engine. So both are loaded before, by the path that this library was linked with.
 *
 * Callers: vendor_graph.c. Threads: any; loaded once in a process and never unloaded.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_VENDOR_NVRTC_H
#define SAFELIGHT_KERNELS_CUDA_VENDOR_NVRTC_H

/* "", or, where it is not found, a half-sentence that says so, behind what cuDNN says of a kernel that it could not compile. cuDNN may still know a place. */
const char *nvrtc_find(void);

#endif
