/* Decodes the part of a JPEG that the views of a sample show. Called by jitted code without the GIL; jpeg_region.py
   describes the functions. There is no global state: threads may call at the same time.

   setup.py compiles this file with the libjpeg-turbo of the machine, since the sizes of libjpeg's structures differ
   between distributions, and defines SOURCE_SHA256, the checksum of this file. */

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "needs libjpeg-turbo >= 2.1: others cannot skip rows or crop columns, or not with these pixels"
#endif

#define MAX_SCANS 500          /* as TJFLAG_LIMITSCANS, see turbojpeg.py */
#define MAX_CROPPED_WIDTH 0.8  /* Leaving out fewer columns costs more than it saves. */

enum { OK, UNREADABLE, WRONG_SIZE }; /* as in turbojpeg.py */

struct decoder {
  struct jpeg_decompress_struct jpeg; /* first: libjpeg's pointers to it are pointers to the decoder */
  struct jpeg_error_mgr errors;
  struct jpeg_progress_mgr progress;
  jmp_buf failed;
  char *message; /* the first warning, or the error */
};

static void on_error(j_common_ptr jpeg) {
  struct decoder *decoder = (struct decoder *)jpeg;
  decoder->errors.format_message(jpeg, decoder->message);
  longjmp(decoder->failed, 1);
}

static void on_message(j_common_ptr jpeg, int level) {
  struct decoder *decoder = (struct decoder *)jpeg;
  if (level < 0 && decoder->errors.num_warnings++ == 0) decoder->errors.format_message(jpeg, decoder->message);
}

static void on_progress(j_common_ptr jpeg) {
  struct decoder *decoder = (struct decoder *)jpeg;
  if (decoder->jpeg.input_scan_number <= MAX_SCANS) return;
  snprintf(decoder->message, JMSG_LENGTH_MAX, "Progressive JPEG image has more than %d scans", MAX_SCANS);
  longjmp(decoder->failed, 1);
}

static void open_decoder(struct decoder *decoder) { /* The caller has set `message`, and calls setjmp. */
  decoder->jpeg.err = jpeg_std_error(&decoder->errors);
  decoder->errors.error_exit = on_error;
  decoder->errors.emit_message = on_message;
  decoder->progress.progress_monitor = on_progress;
  jpeg_create_decompress(&decoder->jpeg); /* fails if the library is not that of the header */
  decoder->jpeg.progress = &decoder->progress;
}

const char *jpeg_region_source(void) { return SOURCE_SHA256; }

int jpeg_region_works(char *message) {
  struct decoder decoder = {.message = message};
  if (setjmp(decoder.failed)) return 0;
  open_decoder(&decoder);
  jpeg_destroy_decompress(&decoder.jpeg);
  return 1;
}

int jpeg_region_decode(const unsigned char *data, size_t num_bytes, int height, int width, int top, int left,
                       int bottom, int right, unsigned char *pixels, char *message) {
  struct decoder decoder = {.message = message};
  j_decompress_ptr jpeg = &decoder.jpeg;
  message[0] = 0;
  if (setjmp(decoder.failed)) {
    jpeg_destroy_decompress(jpeg);
    return UNREADABLE;
  }
  /* A decoder for each image: it would keep the tables of an image for a damaged one that lacks its own. */
  open_decoder(&decoder);
  jpeg_mem_src(jpeg, (unsigned char *)data, num_bytes);
  jpeg_read_header(jpeg, TRUE);
  if (jpeg->image_width != (JDIMENSION)width || jpeg->image_height != (JDIMENSION)height) {
    jpeg_destroy_decompress(jpeg);
    return WRONG_SIZE;
  }
  jpeg->out_color_space = JCS_RGB;
  jpeg->dct_method = JDCT_ISLOW;
  jpeg_start_decompress(jpeg); /* reads all scans if there are several */
  JDIMENSION x = 0, num_columns = width;
  /* A progressive JPEG may omit coefficients, which libjpeg estimates from the blocks around: all of them are needed.
     Other JPEGs of several scans are too rare to be worth a difference. */
  if (!jpeg_has_multiple_scans(jpeg)) {
    /* The upsampling of the chroma reads one sample on either side. */
    int margin = jpeg->max_h_samp_factor > 1 ? jpeg->max_h_samp_factor : 0;
    int from = left > margin ? left - margin : 0, to = right + margin < width ? right + margin : width;
    if (to - from < MAX_CROPPED_WIDTH * width) {
      x = from, num_columns = to - from;
      jpeg_crop_scanline(jpeg, &x, &num_columns); /* moves x to the left, to the edge of a block */
    }
    if (top > 0) jpeg_skip_scanlines(jpeg, top);
  }
  while (jpeg->output_scanline < (JDIMENSION)bottom) {
    JSAMPROW row = pixels + 3 * ((size_t)jpeg->output_scanline * width + x);
    jpeg_read_scanlines(jpeg, &row, 1);
  }
  if (bottom == height) jpeg_finish_decompress(jpeg); /* reads up to the end marker */
  jpeg_destroy_decompress(jpeg);
  return decoder.errors.num_warnings ? UNREADABLE : OK;
}
