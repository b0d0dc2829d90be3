# Included by cmake after every project() of llama.cpp's, by CMAKE_PROJECT_INCLUDE.
#
# Only ggml-cpu is compiled for the cores of a variant; everything else is plain, the same in all variants and compiled once. The option is
# put on the target after ggml's own lists are through. (zig knows cores by -mcpu alone.)
if(PROJECT_NAME STREQUAL "ggml")
    cmake_language(DEFER CALL target_compile_options ggml-cpu PRIVATE "-mcpu=${CDCDA_CPU}")
endif()
