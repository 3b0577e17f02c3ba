// Whether this build has the kernels of x86. GRISTMILL_PORTABLE leaves them out, as on a machine of another
// kind: tests build so everywhere.
#pragma once

#if defined(__x86_64__) && !defined(GRISTMILL_PORTABLE)
#define GRISTMILL_X86
#endif
