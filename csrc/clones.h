// One binary for every x86-64: the loader picks the copy of a function for this CPU. All copies
// give the same bits, so this is a matter of speed only.
#pragma once
#ifdef DG_TARGET_CLONES
#define DG_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DG_CLONES
#endif
