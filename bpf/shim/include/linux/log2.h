/* BCC includes this; nothing of it is needed. */
