/* version.h - the one place that says which Safelight this is. */
#ifndef SAFELIGHT_SERVER_VERSION_H
#define SAFELIGHT_SERVER_VERSION_H

#define SAFELIGHT_VERSION "0.1.0"

#endif
