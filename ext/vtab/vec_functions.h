/* vec_functions.h - scalar and aggregate functions, and vec_each. */
#ifndef VTAB_VEC_FUNCTIONS_H
#define VTAB_VEC_FUNCTIONS_H
#include "sqlite3ext.h"

int vec_functions_register(sqlite3 *db);
int vec_each_register(sqlite3 *db);

#endif
