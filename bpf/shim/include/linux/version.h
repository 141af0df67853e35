#include <uapi/linux/version.h>
