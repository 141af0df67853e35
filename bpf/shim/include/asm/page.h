/* BCC includes this; PAGE_SIZE stands in linux/kconfig.h. */
